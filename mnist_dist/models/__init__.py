"""The model on one machine: the backbones, the classifier built on one, its augmentation, its folder on disk.

Modules: `backbones` (one literal table), `classifier` (uint8 pixels -> probabilities), `augmentation` (a function of
images and random numbers, never saved), `rand_augment` (RandAugment's operations), `mixing` (mixup and CutMix),
`bundle` (a finished model as a folder), `mlmodel` (its file for MLflow), `history` (the epochs of a training run).
Nothing here depends on Ray or calls TensorFlow directly: the models use `keras` and `keras.ops`.
"""
