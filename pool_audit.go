package connpool

import "fmt"

// In debug mode the pool audits its books. A contradiction is a bug in the pool.

// auditShare is how much of what an audit looks at is looked at for each critical
// section: a pool in debug mode works at the same pace whatever its size, and a
// small one is audited after each.
const auditShare = 16

// audit is for debug mode, after a critical section that changed the books: when
// something is on its agenda, and when a connection was given back. It panics if the
// books contradict themselves. It looks at them if so many such sections, together
// with those before, are reason enough; 0 always is.
func (p *Pool) audit(sections int) {
	p.mu.Lock()
	var err error
	if p.auditIn -= sections; p.auditIn <= 0 || sections == 0 || p.wrongMove != "" {
		p.auditIn = (p.n.open() + p.counts.Waiting + p.sites.len()) / auditShare
		err = p.auditLocked()
	}
	p.mu.Unlock()
	if err != nil {
		panic(fmt.Sprintf("connpool: the books contradict themselves: %v", err))
	}
}

// auditLocked is an audit. It may be made at any moment.
func (p *Pool) auditLocked() error {
	for s := range p.sites.all() {
		if err := isKey(s.addr); err != nil {
			return err
		}
	}
	for s := range p.unpooled {
		if err := isKey(s.addr); err != nil {
			return err
		}
	}
	return p.contradictionLocked()
}

// isKey is an error if an address is no key of the books: invariant 7.
func isKey(addr Addr) error {
	if canon, err := addr.canonical(); err != nil || canon != addr {
		return fmt.Errorf("7: key %v is not canonical: %v", addr, err)
	}
	return nil
}
