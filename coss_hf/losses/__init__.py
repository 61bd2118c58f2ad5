"""One file a loss, one plain dictionary of names.

A loss is a module called with student and teacher ``Features`` and the dataset indices of the images. It never holds
a network and returns a dictionary of scalars with the key ``loss``.
"""

from coss_hf.losses.coss import CoSSLoss

LOSSES = {
    "coss": CoSSLoss,
}
