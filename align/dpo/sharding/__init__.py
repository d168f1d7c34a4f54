"""A strategy (ddp, zero2, zero3, fsdp2) in; sharded weights, gathered weights and matching collectives out."""
