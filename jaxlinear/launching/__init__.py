"""Before a run, what it takes on devices that are not present; and how it is started: through a scheduler (SLURM, GKE, TPU
VMs), or as processes of this machine."""
