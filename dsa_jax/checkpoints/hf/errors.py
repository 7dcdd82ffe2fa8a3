"""The error that every part of loading and saving raises."""


class CheckpointError(ValueError):
    """A Hugging Face checkpoint cannot be read or written: the message names the file, the tensor and what to do."""
