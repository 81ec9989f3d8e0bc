"""The devices: streams, events and memory, with one interface and a backend for CPU and CUDA."""
