"""The harness of the studies: a config goes in; numbers, figures and a report come out.

    python -m experiments run configs/study.toml

A study is one module in `experiments/studies`. What surrounds it knows none by name: `commands` is the command line;
`config` reads settings; `runner` runs, and `launch` does so in `jobs`; `manifest`, `folders` and `results` store;
`report`, `plots` and `export` show. `data` and `stats` serve studies.
"""
