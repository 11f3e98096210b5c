"""Tables of runs: a sweep file becomes runs, each in a process of its own."""
