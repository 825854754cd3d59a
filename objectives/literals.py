"""The words that configuration, search, records and figures have in common, each written down once; free of torch."""

from __future__ import annotations

from typing import Literal

#: What is done at a site: its scales are folded into the operators before it, multiplied at run time, or it is left alone.
SiteMode = Literal["fold", "explicit", "left"]
#: What becomes of a weight.
WeightStatus = Literal["quantized", "float"]
#: Where a candidate comes from; that of the winner is the winner's kind.
CandidateKind = Literal[
    "identity", "alpha_0.5", "one_alpha", "best_single", "noise_model", "sampler", "refined", "reused"
]
#: What every winner is compared with; ``one_alpha`` is one alpha for the whole model, the best at its output.
Baseline = Literal["identity", "alpha_0.5", "one_alpha", "best_single"]
#: What the model's output is scored with: the baselines, and the winners of the search.
Variant = Literal["identity", "alpha_0.5", "one_alpha", "best_single", "ours"]
#: Whether every site has its own search, or the model has one.
Scope = Literal["site", "model"]
#: What a search at the model's output lowers.
OutputLoss = Literal["mse", "kl", "task"]

#: How channels are divided into groups.
GroupMethod = Literal["range", "kmeans", "outlier", "multi_outlier", "mean_difference"]
#: What is taken of the activations of a channel.
ChannelStatistic = Literal["absmax", "percentile", "rms"]
#: How a search may set the static range of an activation.
SearchedRange = Literal["tail", "absmax", "percentile", "margin"]
#: How it is set in the end; ``output``: as the model's output asked for, clipped or widened.
RangeStatistic = Literal[SearchedRange, "output"]
#: What the scales of folded sites are rounded to in the end.
ScaleRounding = Literal["none", "pow2"]
#: What is subtracted from every channel before it is scaled.
ShiftStatistic = Literal["none", "mean", "middle"]

#: Format of a site: what its activations are rounded to, and how their scale is set; ``int7-weights``: as the scheme has them, with weights
#: that saturate nowhere; ``float``: nothing of the site is quantized.
SiteFormat = Literal[
    "int8-static", "uint8-static", "int7-weights", "int8-token", "int16-static", "fp8-static", "fp8-token", "float"
]
#: What a product of 8-bit integers is where the model runs: the integer itself, or u8 x s8 added two by two in 16 bits with saturation.
Kernel = Literal["exact", "u8s8-pairs16"]
#: What will serve the model; ``any``: nothing is ruled out.
Target = Literal["any", "vllm", "onnxruntime", "openvino", "tensorrt"]

#: How much of a model is in memory at a time; ``auto``: by what there is.
MemoryMode = Literal["auto", "resident", "blockwise"]
#: Where a model comes from: a Hugging Face folder, a factory function, an object in memory, an embedded demo.
ModelKind = Literal["hf", "factory", "module", "demo"]
#: What a data set holds.
MediaKind = Literal["text", "image", "audio", "video"]

#: Where the clustering of a codebook starts from.
CodebookStart = Literal["linear", "density", "k-means++", "optimal"]
#: How the indices of a codebook are stored: all with the same number of bits, or frequent ones with fewer.
IndexCoding = Literal["packed", "huffman"]
#: How indices of a model are stored: one way for all, or for every tensor the one that takes fewer bytes.
PackedCoding = Literal["packed", "huffman", "smallest"]
#: How a weight finds its entry: the nearest one, or so that errors make up for each other on what the layer reads.
CodebookMatch = Literal["nearest", "compensated"]
#: How a tensor of a compressed model is stored: as a codebook, in the type it has, or a float32 one as float16.
StoredAs = Literal["codebook", "plain", "float16", "squeezed"]
#: What is stored of a weight beside a low-rank branch: codes of a number of bits, or entries of a codebook.
ResidualForm = Literal["int4", "int8", "codebook"]
#: What a decomposition keeps most of: the weight itself, the weight times the size of every input, or the output.
SvdMetric = Literal["plain", "activation", "whitened"]
#: What becomes of a layer that truncation does not make smaller because its spectrum is flat: a branch beside a residual, or nothing.
FlatForm = Literal["branch", "dense"]
#: How the kernel of a convolution becomes a matrix: output channels against all else, or its rows against its columns.
ConvForm = Literal["channel", "spatial"]
#: What pushes the scales of normalizations to zero.
SparsityKind = Literal["l1", "hoyer", "l2sq"]
#: What an output is compared with its reference by.
SignalMetric = Literal["snr", "si_sdr", "stoi", "pesq"]
#: What a model in float is trained on by name.
TaskLoss = Literal["si_sdr", "mr_stft", "mse", "cross_entropy"]
#: Kinds of layers whose ranks are chosen apart: convolutions, the gates of a recurrent layer over its input and over its state, and
#: all other linear layers.
LayerClass = Literal["conv", "recurrent_ih", "recurrent_hh", "linear"]
#: When the performance-drop condition holds: as soon as one metric is out of its tolerance, or only when all are.
DropRule = Literal["any", "all"]

#: Formats of other tools that a result is written in.
ExportFormat = Literal["compressed-tensors", "onnx"]
#: How integers stand in an ONNX model: in the nodes of ONNX Runtime with unsigned or signed weights, or in standard nodes around float ones.
OnnxLayout = Literal["ort-u8", "ort-s8", "qdq"]
#: Tools that a recipe is written for.
RecipeTool = Literal["llm-compressor", "modelopt", "inc", "torchao", "ctranslate2"]
