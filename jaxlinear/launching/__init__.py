"""What a run takes on devices that are not present, found before it starts; and its start: what schedulers (SLURM, GKE, TPU
VMs) are given, or processes of this machine."""
