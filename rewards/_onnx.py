"""An ONNX graph of plain operations as a torch module, through which gradients pass."""
import torch
import torch.nn.functional as F
from torch import nn


def same_padding(x, kernel, strides, value=0.0):
    """ONNX's auto_pad SAME_UPPER: ceil(input / stride) pixels come out, odd padding goes to the end."""
    pad = []    # F.pad begins with the last axis
    for size, k, stride in zip(x.shape[:1:-1], kernel[::-1], strides[::-1]):
        total = max((-(-size // stride) - 1) * stride + k - size, 0)
        pad += [total // 2, total - total // 2]
    return F.pad(x, pad, value=value)


def convolution(x, weight, bias=None, *, kernel_shape, strides, dilations, group, pads=(0, 0, 0, 0),
                auto_pad="NOTSET"):
    top, left, bottom, right = pads
    x = same_padding(x, kernel_shape, strides) if auto_pad == "SAME_UPPER" else x
    padding = (top, left)
    if (top, left) != (bottom, right):
        x, padding = F.pad(x, (left, right, top, bottom)), 0
    return F.conv2d(x, weight, bias, strides, padding, dilations, group)


def max_pool(x, *, kernel_shape, strides, auto_pad, ceil_mode):
    return F.max_pool2d(same_padding(x, kernel_shape, strides, float("-inf")), kernel_shape, strides)


def average_pool(x, *, kernel_shape, strides, pads, ceil_mode, count_include_pad):
    return F.avg_pool2d(x, kernel_shape, strides)


def batch_norm(x, weight, bias, mean, variance, *, epsilon, momentum):
    return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, epsilon)


def take(x, starts, ends, axes, steps=None):
    for i, axis in enumerate(axes.tolist()):
        step = 1 if steps is None else steps[i].item()
        chosen = range(x.shape[axis])[slice(starts[i].item(), ends[i].item(), step)]
        x = x.index_select(axis, torch.tensor(chosen, device=x.device))
    return x


def reshape(x, shape):
    return x.reshape([x.shape[i] if size == 0 else size for i, size in enumerate(shape.tolist())])


def squeeze(x, *, axes):
    return x.squeeze(axes)


def unsqueeze(x, *, axes):
    for axis in sorted(axes):
        x = x.unsqueeze(axis)
    return x


OPERATIONS = {
    "Add": torch.add, "Sub": torch.sub, "Mul": torch.mul, "Div": torch.div, "Pow": torch.pow,
    "Sqrt": torch.sqrt, "Erf": torch.erf, "Relu": torch.relu, "Sigmoid": torch.sigmoid,
    "MatMul": torch.matmul, "Identity": lambda x: x, "Shape": lambda x: torch.tensor(x.shape),
    "Conv": convolution, "MaxPool": max_pool, "AveragePool": average_pool, "BatchNormalization": batch_norm,
    "Slice": take, "Reshape": reshape, "Squeeze": squeeze, "Unsqueeze": unsqueeze,
    "HardSigmoid": lambda x, *, alpha, beta: (alpha * x + beta).clamp(0, 1),
    "Concat": lambda *parts, axis: torch.cat(parts, axis),
    "ReduceMean": lambda x, *, axes, keepdims=1: x.mean(axes, keepdim=bool(keepdims)),
    "Softmax": lambda x, *, axis: x.softmax(axis),
    "Transpose": lambda x, *, perm: x.permute(perm)}


class OnnxModule(nn.Module):
    """The graph of an ONNX file: one input, one output, frozen weights; `metadata` is {key: text}.

    logits: leave out the softmax that ends the graph. Raises ValueError where there is none, and for a graph
    with an operation that OPERATIONS doesn't have.
    """

    def __init__(self, path, logits=False):
        import onnx
        super().__init__()
        model = onnx.load(path)
        graph, self.metadata = model.graph, {entry.key: entry.value for entry in model.metadata_props}
        self.input, self.output = graph.input[0].name, graph.output[0].name
        self.values = {}    # {name in the file: buffer}; names in the file have dots, which buffers may not
        for i, value in enumerate(graph.initializer):
            self.values[value.name] = f"value_{i}"
            self.register_buffer(f"value_{i}", torch.from_numpy(onnx.numpy_helper.to_array(value).copy()))
        self.nodes = []
        for node in graph.node:
            if node.op_type not in OPERATIONS:
                raise ValueError(f"{path} has the operation {node.op_type}, which isn't in OPERATIONS")
            attributes = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
            attributes = {name: value.decode() if isinstance(value, bytes) else value
                          for name, value in attributes.items()}
            self.nodes.append((node.op_type, attributes, list(node.input), node.output[0]))
        if logits:
            *self.nodes, (operation, _, (self.output,), _) = self.nodes
            if operation != "Softmax":
                raise ValueError(f"{path} ends in {operation}, not in Softmax")

    def forward(self, x):
        values = {name: getattr(self, buffer) for name, buffer in self.values.items()}
        values[self.input] = x
        for operation, attributes, inputs, output in self.nodes:
            values[output] = OPERATIONS[operation](*(values[name] for name in inputs), **attributes)
        return values[self.output]
