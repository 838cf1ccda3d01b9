"""What the bytes of a compiled step are for."""

from olmax.planning import program


def saved_activations(text: str, n_layers: int) -> int:
    """Bytes of what the forward pass keeps for the backward pass, one device.

    Those are the arrays with a leading dimension of layers that the forward loop over the layers
    fills; arrays it only passes on are parameters.
    """
    read = program.parse(text)
    saved = 0
    for computation in read.computations.values():
        for loop in computation.instructions:
            if loop.opcode != "while" or "jvp(" not in loop.op_name:
                continue
            if "transpose(" in loop.op_name or read.trip_count(loop) != n_layers:
                continue
            body = read.computations[loop.called["body"][0]]
            shapes = program.array_shapes(loop.type)
            arrays = [_one(kind, shape) for kind, shape in shapes]
            for i, name in enumerate(body.root.operands):
                passed = body.by_name[name].opcode == "get-tuple-element"
                if not passed and i < len(shapes) and shapes[i][1][:1] == (n_layers,):
                    saved += arrays[i]
    return saved


def _one(dtype: str, shape: tuple[int, ...]) -> int:
    return program.array_bytes(f"{dtype}[{','.join(map(str, shape))}]")
