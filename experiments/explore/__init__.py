"""The explorers: one interactive page a concept, and one server for all.

    make explore

A page is a marimo notebook and a script. `compute` returns the numbers it shows, from programs compiled once, and
`code` the plain jprob code that gives the same numbers; the tests compare the two. The first line of a page's docstring
has its place, title and subject in the index.
"""
