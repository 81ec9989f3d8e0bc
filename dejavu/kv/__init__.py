"""DéjàVuLib: KV-cache layouts, pools, and the primitives that stream them."""
