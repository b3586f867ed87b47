"""Cases for the kernels at the sizes of published models: checked by tests, timed by a tool."""
