"""The explorers: one interactive page a concept, and one server for all.

    make explore

A page is a marimo notebook and a script. `compute` returns the numbers of the page, from programs compiled once.
`code` returns the plain jprob code for them. The tests compare the two. The first line of a page's docstring
has its place, title and subject in the index.
"""
