#!/bin/bash
#SBATCH --job-name=griffin
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
#SBATCH --partition=gpu
#SBATCH --requeue

# Before the time is up every process gets SIGTERM, saves itself and ends with status 75; the job goes
# back into the queue; after a preemption SLURM puts it there. The same command goes on from what was saved.
module load cuda
srun --kill-on-bad-exit=0 python launch/train.py --config=configs/griffin_100m.py --workdir=/shared/runs/griffin --config.model.pattern=rg_lru,gla --expect=gpu:16
status=$?
if [ "$status" -eq 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
