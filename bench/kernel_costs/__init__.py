"""What the Triton kernels cost, from their machine code: ``python bench kernel_costs``.

The parts are read elsewhere, too: tests compile (:mod:`kernel_costs.offline`) and run every kernel in the
interpreter (:mod:`kernel_costs.interpreter`). Nothing is imported here, for triton has to see its environment
first.
"""
