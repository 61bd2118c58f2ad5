from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import (
    BaseModelOutputWithPoolingAndNoAttention,
    ImageClassifierOutputWithNoAttention,
)
from transformers.utils import can_return_tuple


def convolution(
    in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, bias: bool = False
) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=bias)


class CifarPreTrainedModel(PreTrainedModel):
    main_input_name = "pixel_values"

    def _init_weights(self, module: nn.Module):
        if isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)


class CifarModel(CifarPreTrainedModel):
    """A network without a classifier; `config.hidden_sizes[-1]` is the dimension of `pooler_output`."""

    def maps(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """The maps at the end of the stages, after the ReLU."""
        raise NotImplementedError

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool | None = None, **kwargs
    ) -> BaseModelOutputWithPoolingAndNoAttention:
        """`pixel_values` (b, num_channels, h, w), normalised.

        Returns `last_hidden_state`, the last map (b, C, h', w'), `pooler_output` (b, C, 1, 1), its average, and, where
        asked for, `hidden_states`: the maps at the end of the stages, after the ReLU.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        maps = self.maps(pixel_values)
        return BaseModelOutputWithPoolingAndNoAttention(
            last_hidden_state=maps[-1],
            pooler_output=nn.functional.adaptive_avg_pool2d(maps[-1], 1),
            hidden_states=maps if output_hidden_states else None,
        )


class CifarForImageClassification(CifarPreTrainedModel):
    """A network with a linear classifier of `config.num_labels` outputs on the pooled map."""

    backbone_class: type[CifarModel]

    def __init__(self, config):
        super().__init__(config)
        setattr(self, self.base_model_prefix, self.backbone_class(config))
        self.classifier = nn.Linear(config.hidden_sizes[-1], config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> ImageClassifierOutputWithNoAttention:
        """`pixel_values` (b, num_channels, h, w), normalised; `labels` (b,), for which the cross-entropy is returned.

        `logits` are (b, num_labels); `hidden_states` as those of the network without a classifier.
        """
        outputs = self.base_model(pixel_values, output_hidden_states=output_hidden_states, return_dict=True)
        logits = self.classifier(outputs.pooler_output.flatten(1))
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits, hidden_states=outputs.hidden_states)
