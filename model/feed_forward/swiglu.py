"""SwiGLU, Llama's mlp."""

from torch.nn.functional import silu

from model.feed_forward.glu import GLU


class SwiGLU(GLU):
    """down(silu(gate(x)) * up(x))."""

    activation = staticmethod(silu)
