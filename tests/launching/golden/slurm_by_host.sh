#!/bin/bash
#SBATCH --job-name=griffin
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=24
#SBATCH --time=01:30:00
#SBATCH --signal=TERM@60
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
#SBATCH --requeue

# Before the time is up every process gets SIGTERM, saves itself and ends with status 75; the job goes
# back into the queue; after a preemption SLURM puts it there. The same command goes on from what was saved.
export SRUN_CPUS_PER_TASK=24
srun --kill-on-bad-exit=0 python launch/train.py --config=configs/griffin_100m.py --workdir=/shared/runs/griffin --config.model.pattern=rg_lru,gla --expect=gpu:4
status=$?

# SLURM's own count has preemptions too: each failure is a line here, until the job is done.
failures="griffin-$SLURM_JOB_ID.failures"
case "$status" in
  0)
    rm -f "$failures"
    exit 0
    ;;
  75) ;;
  2) exit 2 ;; # the next start would be refused as this one was
  *)
    echo "status $status" >> "$failures" || exit "$status"
    if [ "$(wc -l < "$failures")" -gt 20 ]; then
      echo "the run failed with status $status, after 20 restarts ($failures); sbatch this script to resume it" >&2
      exit "$status"
    fi
    ;;
esac
for pause in 15 30 60 60 60 0; do # the controller may be starting again
  scontrol requeue "$SLURM_JOB_ID" && exit "$status"
  sleep "$pause"
done
echo "SLURM did not take the job back into the queue; sbatch this script to resume it" >&2
exit "$status"
