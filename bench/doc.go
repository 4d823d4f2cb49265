// Package bench does the same work with this pool and with its alternatives, in one run
// on one machine, so that the ratios are reliable even where the single figures are not.
//
//	go test .                      every rival keeps the rules, and each benchmark runs once
//	go test -run '^$' -bench W1 .  one workload; the output is benchstat's
//	go run ./cmd/table             five rounds over everything, medians, one table
//	go run ./cmd/table -addr HOST:PORT
//	                               pooled and unpooled, with a server of yours
//	go run ./cmd/scale             the figures of docs/sizing.md
//
// A workload uses a rival only through [Rival]. All rivals have the same limits, dial
// through the same function and, if they check a connection before lending it, check with
// the same system call; see [Settings].
package bench
