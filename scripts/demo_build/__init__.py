"""The stages of `scripts/build_demo.py`: towers, policy, critic, export."""
