"""Questions in, samples, scores and pairs out: one small file per stage; a stage never imports another one."""
