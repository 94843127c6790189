"""Before a run, what it takes on devices that are not there; and its start: what schedulers are given (SLURM, GKE, TPU
VMs), or processes of this machine."""
