"""Starting a run on many machines: what a scheduler is given (SLURM, GKE, TPU VMs), and processes on this one."""
