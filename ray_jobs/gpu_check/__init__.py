"""`ca2st bench gpu`: one program that says within ten minutes what a GPU does for us, and what it does not.

``settings`` sizes and time budgets, ``parts`` what is measured, row by row, ``isolation`` a part in a process of its
own, so that one that crashes or hangs costs its own time only, ``report`` what comes out.
"""
