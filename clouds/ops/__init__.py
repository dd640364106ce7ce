"""Optimized operators: the same results as a plain form in torch, in less time or memory.

- `deformable_attention`: multi-scale deformable attention. The plain form is
  `deformable_attention_torch`; `deformable_attention_cpu` and `deformable_attention_triton` are
  the kernels.
- `convnext`: the stages of timm's ConvNeXt in inference on a CPU. The plain form is timm's.
- `in_cache`: a function of a batch in inference on a CPU, one item after the other. The plain
  form is the function itself.
- `sam`: SAM's image encoder and mask decoder. The plain form is segment_anything's.

Tests compare each operator with its plain form.
"""
