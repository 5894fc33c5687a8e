"""What a run will need, known before it begins: memory by phase, time, energy, and what to change where it does not fit. No torch.

`shapes` says what a model is made of, `activations` what its layers keep, `memory` adds it up; `cards` knows GPUs and `pace` how fast
they are; `lengths` looks at the rows; `changes` searches; `runner` is the verb.
"""
