"""Update rules: what a server does with a gradient. One small file each.

The contract, `base.Rule`:

- `update(x, gradient, state, eta, count, staleness, read)` changes the parameters x and the arrays
  of the state in place, and nothing else. The result depends on these arguments alone, so a run,
  its simulation and its replay agree to the last bit. `count` is the number of updates before this
  one, which a bias correction needs; `read` holds the parameters at which the gradient was
  computed, if the rule `reads` them.
- `state` names the arrays that it keeps. Checkpoints contain them under these names.
- Precision is that of the parameters: `init` makes arrays like them, and numbers are Python floats,
  which change no precision.
- x is one vector (d,), or paths (paths, d) that get one gradient each. A `blockwise` rule treats
  every entry alike, and gets long vectors in blocks that stay in the cache.
- An update allocates nothing: a rule declares how many `scratch` arrays it needs and gets them
  after its state.

`base.Optimizer` keeps the state and the scratch arrays of a rule at work; `make.make_rule` makes
the rule of a configuration.
"""
