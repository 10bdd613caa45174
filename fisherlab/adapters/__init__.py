"""Other libraries' approximations as blocks of ours, in our scale, and ours in theirs.

`fl.adapters.curvlinops("kfac")` is a function of a capture, so that another library's method stands
beside ours: `fl.compare(..., approximations={"curvlinops KFAC": fl.adapters.curvlinops("kfac")})`.
`from_*` takes what the library has computed on a whole model; `to_*` is the way back. Each says its
scale; `conventions()` has one table of all.
"""

from fisherlab.adapters.conventions import conventions
from fisherlab.adapters.library import AdapterError
from fisherlab.adapters.operators import as_curvlinops_operator
from fisherlab.adapters.through_asdl import from_asdl
from fisherlab.adapters.through_backpack import from_backpack, to_backpack
from fisherlab.adapters.through_bergson import from_bergson
from fisherlab.adapters.through_curvlinops import curvlinops, from_curvlinops, to_curvlinops
from fisherlab.adapters.through_kronfluence import from_kronfluence, to_kronfluence
from fisherlab.adapters.through_nngeometry import from_nngeometry, to_nngeometry

__all__ = [
    "AdapterError",
    "as_curvlinops_operator",
    "conventions",
    "curvlinops",
    "from_asdl",
    "from_backpack",
    "from_bergson",
    "from_curvlinops",
    "from_kronfluence",
    "from_nngeometry",
    "to_backpack",
    "to_curvlinops",
    "to_kronfluence",
    "to_nngeometry",
]
