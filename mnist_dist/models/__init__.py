"""The model on one machine: the networks there are, the classifier around them, its augmentation, its folder on disk.

Modules: `backbones` (one literal table), `classifier` (uint8 pixels -> probabilities), `augmentation` (a model of its
own, never saved), `bundle` (a finished model as a folder). Nothing here knows of Ray, and nothing imports TensorFlow:
the models speak `keras` and `keras.ops`.
"""
