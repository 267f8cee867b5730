"""Names and released settings of the method, for the command line too: nothing here needs torch."""

VARIANTS = ("paper", "first", "released")  # of MG-MRA's memory
LEVELS = ("part", "instance", "semantic")  # granularities, the finest first
HEALTH = ("zero_reads", "survivors", "used", "entropy")  # numbers of `MemoryHealth.summary`

TEMPERATURE = 0.02  # of cosine addressing; this project's
SHRINK = 0.0025  # lambda: addressing weights at or below it are dropped
INSTANCES_PER_ID = 5  # T
PARTS_PER_INSTANCE = 6  # R; not tied to the number of stripes
MARGIN = 0.3  # hetero-centre and batch-hard triplet
LABEL_SMOOTHING = 0.1
STAGES = ("stem", "layer1", "layer2", "layer3", "layer4")  # of the backbone
