"""What is run on a machine with a GPU, in order of worth: see bench/on_gpu.sh.

plans     which steps there are, in which order, with which caps
runner    runs them: logs, caps, and packing; needs no torch, so that a broken one is evidence too
facts     the machine, the versions, and whether the compiled core serves its GPU
speed     the timings; questions: the small ones; variants: cores that were built with other macros
ncu       bytes of DRAM, counted by the GPU
cifar     ResNet-18 on CIFAR-100
goals     what is to be reached, and what was predicted, as data
page      the page of tables that is made of all that
prepare   builds the core and its variants beforehand, on a machine without a GPU
outcomes  a plugin of pytest, which writes down each test's outcome at once
pretend   for rehearsals: pytest collects as if there were a GPU
"""
