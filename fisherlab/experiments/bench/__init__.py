"""The library's cost, measured against one ordinary step and against other libraries.

timing      paired, interleaved ratios of two calls in one process
machine     what the machine can do, and what a call asks of it
setting     the networks and the batch; a row of the table, and the loop that fills it
peers       BackPACK, curvlinops, opacus, NNGeometry, torch.func, where they are installed
capture, build, compare, optim, scaling, sizes       one part of `fisherlab bench` each

A part of the package, so that `fisherlab bench` runs from an installed wheel.
"""
