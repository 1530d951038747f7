# shellcheck shell=bash
# What your site needs, in one place: copy to slurm/site.sh (or name another file with DTL_SITE) and keep what applies.
# The templates source it on the job's first node, before anything else; what is exported reaches the ranks on all nodes.
# Partition, account, quality of service: options of sbatch, or SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_QOS in your shell.

# module load python/3.11 cuda/12.4
# source "$HOME/venvs/dtl/bin/activate"
# export DTL_WRAP="apptainer exec --nv $HOME/dtl.sif"        # a container: Slurm's own commands stay outside of it
# export DTL_PYTHON=python3

# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0       # nodes with several networks: the one that they share
# export DTL_CACHE=/shared/$USER/dtl-cache                   # a shared cache instead of one on each node's disk
# export WANDB_MODE=offline                                  # nodes without a way out; `wandb sync` later
