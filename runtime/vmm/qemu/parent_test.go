package qemu

func parentMain() {}
