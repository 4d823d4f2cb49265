package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"
)

// teller writes in the background what is written to it, in order, so that
// nobody waits for a reader that stands still. It is for few words: what it
// cannot get rid of stays in memory until the end.
type teller struct {
	w io.Writer

	mu      sync.Mutex // guards what follows; nothing is written under it
	waiting [][]byte
	ended   chan struct{} // closed when all is written; nil: nobody writes
}

func (t *teller) Write(b []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.waiting = append(t.waiting, append([]byte(nil), b...))
	if t.ended == nil {
		t.ended = make(chan struct{})
		go t.write(t.ended)
	}
	return len(b), nil
}

func (t *teller) write(ended chan struct{}) {
	defer close(ended)
	for {
		t.mu.Lock()
		batch := t.waiting
		t.waiting = nil
		if len(batch) == 0 {
			t.ended = nil
			t.mu.Unlock()
			return
		}
		t.mu.Unlock()
		for _, b := range batch {
			t.w.Write(b) // to a reader that is gone there is nothing to say
		}
	}
}

// lastWords is how long a report may take when the process ends.
const lastWords = time.Second

// flush waits for what was written, for lastWords; if the report is what the
// command is for, until ctx is done.
func (t *teller) flush(ctx context.Context, report bool) {
	t.mu.Lock()
	ended := t.ended
	t.mu.Unlock()
	if ended == nil {
		return
	}
	if report {
		select {
		case <-ended:
		case <-ctx.Done():
		}
	}
	late := time.NewTimer(lastWords)
	defer late.Stop()
	select {
	case <-ended:
	case <-late.C:
	}
}

var errNotWaited = errors.New("told to end before it was ready")

// within runs what may hang in a system call, such as the opening of a file on a
// server that is gone. It waits a second longer than ctx, and no more: the
// process ends, and takes what hangs with it.
func within(ctx context.Context, do func() error) error {
	done := make(chan error, 1)
	go func() { done <- do() }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
	}
	late := time.NewTimer(lastWords)
	defer late.Stop()
	select {
	case err := <-done:
		return err
	case <-late.C:
		return fmt.Errorf("%w: %w", errNotWaited, context.Cause(ctx))
	}
}
