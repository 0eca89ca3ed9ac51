"""Several runs of one experiment: variants of the connection under several seeds."""

from manifold_hc.extras import require_train

require_train("manifold_hc.study")
