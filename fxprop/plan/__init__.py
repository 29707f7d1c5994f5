"""The frozen records that the stages hand to each other: sites, decisions, the plan.

The words, as they are used everywhere:

site        one use of a weight in the model: a call of a convolution, a linear layer, a product
channel     an output channel of a convolution, an output feature of a product: see `fxprop.ops.axes`
n           how many things one choice is made from; k: how many of them are kept; keep: the share k / n
kept        what is kept of grad_output; the gradients are those of the dense backward with the rest at zero
score       what top-k ranks by: see `fxprop.ops.scores`
select      what is chosen, channels, entries or rows: see `fxprop.ops.selections`
run         one of several choices at a site: a group of a convolution, an expert
region      a layer with the norm and activation behind it, which get one backward
chain       convolutions in a row, of which one computes only the channels that the one in front will keep
plan        one decision for each site; a decision says whether it is rewritten, with what, or why not
piece       a module of the model that was traced alone; part: a model traced in pieces is traced in parts
opaque      a module that is kept as one call, its code unseen
twin        a copy of the model, or of a tensor, that a run may change without leaving a trace
account     what one run did, operator by operator, to be compared with that of another
recipe      what a transformed module was made from: its sites, policy and plans; for reports and set_keep
"""
