from transformers import PreTrainedConfig


class CifarConfig(PreTrainedConfig):
    """What networks for 32x32 images share; see the classes made of it.

    Raises:
        ValueError: for numbers that define no network.
    """

    def check(self, stages: int, *names: str, **kwargs) -> dict:
        """Checks `hidden_sizes` and the numbers named, and adds to `kwargs` where the code of the network is."""
        self.hidden_sizes = list(self.hidden_sizes)
        if len(self.hidden_sizes) != stages or min(self.hidden_sizes) < 1:
            words = {3: "three", 5: "five"}
            raise ValueError(f"hidden_sizes={self.hidden_sizes}: give {words[stages]} positive widths")
        for name in ("num_channels", "image_size", *names):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: give a positive number")
        # Every class is named, whichever is saved: a process without this package can then load the backbone
        # out of a classifier's checkpoint with trust_remote_code=True.
        kind, file = type(self).__name__.removesuffix("Config"), type(self).__module__.rpartition(".")[2]
        code = file.replace("configuration", "modeling")
        kwargs["auto_map"] = {
            "AutoConfig": f"{file}.{kind}Config",
            "AutoModel": f"{code}.{kind}Model",
            "AutoModelForImageClassification": f"{code}.{kind}ForImageClassification",
        }
        return kwargs
