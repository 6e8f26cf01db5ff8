"""Two extension modules, one in Cython and one in C. Neither is linked with anything."""

from Cython.Build import cythonize
from setuptools import Extension, setup

import fastsoftmax

include = [fastsoftmax.get_include()]  # fastsoftmax.h
setup(
    ext_modules=[
        *cythonize([Extension("embedded.routing", ["embedded/routing.pyx"], include_dirs=include)]),
        Extension("embedded.plain", ["embedded/plain.c"], include_dirs=include),
    ]
)
