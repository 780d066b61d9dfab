"""Several devices and hosts: the mesh, the processes, loading a model onto them."""
