#!/bin/bash
# Train on the nodes of a SLURM job: one process per GPU, or one per node without GPUs. Activate the environment, and
# start it in a directory that all nodes share. In a checkout:
#   sbatch --nodes=4 --gpus-per-node=8 launch/slurm.sh r3gan-cifar10 --data cifar10 --run-dir runs/large
# An installed package has this file at "$(gen-dist launchers)/slurm.sh".
# The same command again, or SLURM after a preemption, resumes the run.
#SBATCH --job-name=gen_dist
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1  # a launcher, which starts the node's processes
#SBATCH --exclusive          # all CPUs of the nodes
#SBATCH --signal=TERM@180    # three minutes before the time limit: the run saves and ends
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

# sbatch runs a copy of this script, so Python says where the configs are: in this checkout, or in the installed package.
configs=$(python -c 'import gen_dist; print(gen_dist.__path__[0])')/launch/configs

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
nodes=${#hosts[@]}
gpus=${SLURM_GPUS_ON_NODE:-0}
if ((gpus > 0)); then
    config=$configs/hosts_8_gpus.yaml processes=$((nodes * gpus))
else
    config=$configs/hosts_cpu.yaml processes=$nodes
fi
port=$((20000 + SLURM_JOB_ID % 10000))  # jobs that share a node need different ports

# A node knows its own number only when it runs, so the inner shell inserts it. srun does not inherit the CPUs of a task
# from sbatch; without this option all processes of a node would share one CPU.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" \
    bash -c 'exec accelerate launch --machine_rank "$SLURM_NODEID" "$@"' launch \
    --config_file "$config" --num_machines "$nodes" --num_processes "$processes" \
    --main_process_ip "${hosts[0]}" --main_process_port "$port" -m gen_dist.launch.train "$@"
