"""DANet for visible-infrared person re-identification: the model and the losses of the paper.

backbone   ResNet with last stride 1; one stream, or the stems of the paper's Table 1 baselines
model      DANet: backbone, pooling, BN neck, classifiers C, C_v, C_r
losses     Eq. 1 to 5, and their weighted sum (Eq. 6)
"""

VISIBLE, INFRARED = 0, 1
MODALITIES = ("visible", "infrared")  # indexed by the two constants above
