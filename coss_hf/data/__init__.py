"""Images: loading, checking, augmentation and the groups of views that training sees."""
