"""The network under the policy: model families, shared-prefix attention, fast linear layers."""
