"""Small foundation models of rendered streets, and the commands that train them.

scenes       rendered scenes for pre-training, as memory-mapped arrays
captions     what a caption says of a crop, in varied wording
crops        random crops of the scenes with captions, and object crops with a class
train_clip   trains Street-CLIP
evaluate_clip    zero-shot accuracy on object crops
sam_data     windows of scenes, point prompts and their masks
train_sam    trains Street-SAM
evaluate_sam     IoU of masks for points, labels refined with them
records      writes the records of the weights
"""
