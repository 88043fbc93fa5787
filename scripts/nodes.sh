# Sourced by the recipes of 32 images a step: `launch`, what starts main.py on this node, and `batch`, the images a GPU,
# for NODES nodes of 8 GPUs (1 unless set). Where there are several, torchrun starts on each: NODE_RANK counts them
# from 0, MASTER_ADDR is the name of the first, MASTER_PORT a free port there (29500 unless set).
nodes=${NODES:-1}
case $nodes in
  1 | 2 | 4) batch=$((4 / nodes)) ;;
  *) echo "NODES=$nodes: 32 images a step are for 1, 2 or 4 nodes of 8 GPUs" >&2 && exit 2 ;;
esac
if [[ -n ${LAUNCH:-} ]]; then
  meet= # the launcher knows
elif ((nodes == 1)); then
  meet=--standalone
else
  meet="--nnodes=$nodes --node_rank=${NODE_RANK:?NODES=$nodes: set it to the number of this node, from 0}"
  meet+=" --master_addr=${MASTER_ADDR:?NODES=$nodes: set it to the name of the first node}"
  meet+=" --master_port=${MASTER_PORT:-29500}"
fi
read -ra launch <<< "${LAUNCH:-torchrun $meet --nproc_per_node=8}"
