# Sourced by recipes that keep the number of images a step on any number of nodes: `images` a step (32 unless the recipe
# says otherwise) on `gpus` GPUs a node (8). Gives `launch`, what starts main.py on this node, and `batch`, the images a
# GPU. NODES (1 unless set) and GPUS_PER_NODE change where it runs. On several nodes torchrun starts on each: NODE_RANK
# counts them from 0, MASTER_ADDR is the name of the first, MASTER_PORT a free port there (29500 unless set).
nodes=${NODES:-1} gpus=${gpus:-8} images=${images:-32}
((nodes > 0 && images < nodes * gpus)) && gpus=$((images / nodes)) # one image a GPU, on fewer GPUs a node
gpus=${GPUS_PER_NODE:-$gpus}
if ((nodes < 1 || gpus < 1 || images % (nodes * gpus) != 0)); then
  echo "NODES=$nodes GPUS_PER_NODE=$gpus: $images images a step cannot be shared out evenly; change one of them" >&2
  exit 2
fi
batch=$((images / (nodes * gpus)))
if [[ -n ${LAUNCH:-} ]]; then
  meet= # the launcher knows
elif ((nodes == 1)); then
  meet=--standalone
else
  meet="--nnodes=$nodes --node_rank=${NODE_RANK:?NODES=$nodes: set it to the number of this node, from 0}"
  meet+=" --master_addr=${MASTER_ADDR:?NODES=$nodes: set it to the name of the first node}"
  meet+=" --master_port=${MASTER_PORT:-29500}"
fi
read -ra launch <<< "${LAUNCH:-torchrun $meet --nproc_per_node=$gpus}"
