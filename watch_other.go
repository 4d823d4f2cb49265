//go:build !linux

package connpool

// watcher is for systems that tell of a hang-up without a goroutine for each
// connection; here the sweep finds it.
type watcher struct{}

func (p *Pool) startWatcher() {}

func (*watcher) close()       {}
func (*watcher) add(*conn)    {}
func (*watcher) remove(*conn) {}
func (*watcher) rearm(*conn)  {}
