"""The operations of a capsule network: squash, primary capsules, votes and routing by agreement.

Shapes use one set of letters everywhere: batch B, input capsules N, output capsules J, input
dimension K, output dimension D. `u` [B, N, K] are input capsules, `W` [N, K, J, D] transformation
matrices, `v` [B, J, D] output capsules. On a grid these have two dimensions more: height H and
width Wd of u, kh and kw of W.
"""

from .conv_routing.op import conv_routing, explain_conv
from .momentum.op import momentum_routing
from .primary.op import primary_capsules
from .routing.op import explain, routing
from .squash.op import squash
from .verification import verify
from .votes.op import votes

__all__ = [
    "conv_routing",
    "explain",
    "explain_conv",
    "momentum_routing",
    "primary_capsules",
    "routing",
    "squash",
    "verify",
    "votes",
]
