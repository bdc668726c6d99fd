"""The harness of the studies: a config goes in; numbers, figures and a report come out.

    python -m experiments run configs/study.toml

A study is one module or package in `experiments/studies`. The harness knows none by name: `commands` is the command
line; `config` reads settings; `runner` runs, and `launch` does so in `jobs`; `manifest`, `folders` and `results` store;
`findings` is what a study hands to `report`; `plots`, `mathml` and `export` show. `data`, `stats`, `timing` and `arms`
serve studies.
"""
