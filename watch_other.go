//go:build !linux

package connpool

// watcher is for systems that tell of a hang-up without a goroutine for each
// connection; here the sweep finds it.
type watcher struct{}

const canWatch = false

func newWatcher() (*watcher, error) { return nil, nil }

func (p *Pool) watch(w *watcher) { p.unwatched(w) }

func (*watcher) close()          {}
func (*watcher) add(*conn) error { return nil }
func (*watcher) remove(*conn)    {}
func (*watcher) rearm(*conn)     {}
