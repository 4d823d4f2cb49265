// Package bench does the same work with this pool and with what people use in
// its place, in one run on one machine, so that the ratios can be trusted even
// where the figures cannot.
//
//	go test .                      every rival keeps the rules, and each benchmark runs once
//	go test -run '^$' -bench W1 .  one workload; the output is benchstat's
//	go run ./cmd/table             five rounds over everything, medians, one table
//	go run ./cmd/table -addr HOST:PORT
//	                               pooled and unpooled, with a server of yours
//	go run ./cmd/scale             the figures of docs/sizing.md
//
// A workload asks nothing of a rival but what [Rival] says. All rivals have the
// same limits, dial through the same function and, where they look at a
// connection before lending it, look with the same system call; see [Settings].
package bench
